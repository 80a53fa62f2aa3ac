"""Adapters for the field's harnesses of visual question answering. Neither harness is a dependency."""
