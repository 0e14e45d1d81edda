"""A small double of the memo package (memoavatar/memo), written for these tests.

It keeps memo's interface: modules, names, signatures, order of calls, what a block takes and returns, and how the
memory of past frames is written. It computes something simpler. `tests/test_memo_double.py` holds it to the real
package where that is present.
"""
