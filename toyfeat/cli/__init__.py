"""Command line: ``toyfeat fetch | collect | decompose | train | ... | doctor``."""
