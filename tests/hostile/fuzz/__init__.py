"""Bytes that anybody can send, and what becomes of them: the targets, a coverage-guided fuzzer, and the kept corpus.

Always true of a target: whatever the bytes, it gives its verdict in words (a short text that depends on nothing but the
bytes), or raises `contracts.errors.FiError`. Any other exception, a hang or a great use of memory is a finding.
"""
