"""Who is calling, and what they may do: identities, permissions and quotas.

Tokens, JSON Web Tokens and certificates become a `Caller`; `permissions` lists what each call
requires. This room knows nothing of gRPC and of lanes, and it never logs a secret.
"""
