"""Whole models under emulation: models of others and their weights, data that streams, many processes, one result.

`models` makes a torch model from a name, `samples` reads what it is fed with, `shards` splits the work over processes,
`run` measures float32 against LNS. The arithmetic itself is `lnsdeploy.emulate`, which none of them touches.
"""
