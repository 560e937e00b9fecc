"""`paro bench`: attention on named workloads beside its peers, one row per workload, contestant, widths and density.

`cases` makes tensors, masks and plans; `jobs` says what is measured and in which sequence; `measure` makes the row of a
job in this process; `worker` does so in a process of its own, which may crash or hang; `run` asks for one row after
the other within a budget; `report` adds what is known only of all rows together, and draws; `targets` are what the
kernels are to reach on a GPU; `promises` are the figures with targets that need no peer. `pallas_kernels.bench` does
the timing.
"""
