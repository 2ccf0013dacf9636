"""Outside witnesses: what transformers' own MoE blocks compute must be what the oracle computes, within its derived bound.

`witness`    a block's inputs and output as data (torch only), and its safetensors file
`agreement`  the comparison: oracle's routing and chain on one side, the block's output on the other
`build`      the table of transformers' blocks, and how their weights become moeproof Inputs
`misread`    deliberately wrong readings of the same model, which the comparison must reject
`adapters`   transformers' three expert implementations as candidates
`record`     writes golden/: `PYTHONPATH=src python -m tests.families.record`
"""
