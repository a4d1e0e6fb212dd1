"""Checkers: one module per lesson, each exercise of it an `Exercise` to call with the reader's answer."""
