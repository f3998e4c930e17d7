"""Proof over the wire that nothing accepted is ever lost: crashes, power cuts, and long use."""
