"""A small stand-in for lm-evaluation-harness: its client of completions and its evaluator, as far as used.

Written from the documented interface, so that the suite needs none of the real one's dependencies.
"""
