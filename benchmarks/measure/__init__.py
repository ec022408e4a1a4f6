"""How it is measured: the gate before the clock, the clock, memory, launches, bandwidth, and where every number comes from."""
