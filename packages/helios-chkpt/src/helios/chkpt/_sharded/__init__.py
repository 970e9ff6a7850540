"""Checkpoints whose tensors are spread over processes: a folder that is one checkpoint.

`folder` says what is in it and who may delete what, `manifest` and `metadata` read what it says of itself, without
torch; `split`, `ranks`, `stream` and `write` make one, `read` loads one. `docs/format.md` has the layout.
"""
