"""A small double of the memo package (memoavatar/memo), written for these tests.

It keeps memo's interface: modules, names, signatures, order of calls, what a block takes and returns, and how the
memory of past frames is written. It computes something simpler. `tests/test_memo_double.py` holds its signatures to the
real package where that is present, and the tests of MEMO run on either.
"""
