"""The wire: decode, call, encode. No rule is decided here."""
