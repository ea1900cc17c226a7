"""One-line bugs, each with the test that must catch it: `python -m tests.mutants run | table`.

They are kept in the TOML files beside this one. docs/reliability.md shows them as a table.
"""
