"""The oracle's own oracles: scalar readings of the contract, and float32 arithmetic that must stay within the bounds.

`scalar` one token, one slot, one number at a time, in Python floats; `scalar_router` the same for ROUTE;
`arithmetic` ordinary float32 and 16-bit implementations, which a derived bound may never reject.
"""
