"""Resumable data."""
