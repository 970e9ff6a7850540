"""The file format, without torch: what every reader and every writer of checkpoints shares.

`values` says what a state is made of once it is in a file, `encode` and `decode` turn that into a pickle and
back, `layout` and `manifest` say where every byte of the archive goes, `archive` reads one, strictly.
"""
