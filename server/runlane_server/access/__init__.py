"""Authentication, permissions and quotas.

Tokens, JSON Web Tokens and certificates become a `Caller`; `permissions` lists the role that each
call requires. This room does not know gRPC or lanes, and it never logs a secret.
"""
