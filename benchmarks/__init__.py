"""Benchmarks of Helios against its peers; see README.md. Not part of any distribution."""
