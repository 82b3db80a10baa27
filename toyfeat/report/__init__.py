"""Rows to JSON, tables, figures and one self-contained page."""
