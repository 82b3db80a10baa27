"""A transformer that adds modulo a number, and the bases that fit it."""
