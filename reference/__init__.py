"""What is right: the contract, the float64 oracle and plain PyTorch implementations of the seed's interfaces.

`contract` nouns, stage table and interfaces (the only part that optimized code may import)
`oracle`   float64 loops over experts and the error bound beside each value
`eager`    the seed's interfaces in plain PyTorch
"""
