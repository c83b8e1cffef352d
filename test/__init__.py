"""Tests, the local platform harness and the generator of sample stacks. Run from the repository root."""
