"""Float64 loops written from the published formulas: what the library's losses and gradients are compared with.

Nothing here imports the library, and no vectorised maths is used: a level is read and written one element at a time, in Python floats (IEEE
doubles), so that a formula stands here as it stands on paper. Gradients are closed forms where one is known, and else the chain rule
through the loops themselves (`tape`); `numeric.gradient` (five-point differences) checks both.

Modules: `primitives` (channel means, weighted sums, attention, imitation), `maps` (normalised maps and their distance), `boxes` (masks), a
file for every loss; `layers`, `gc_block`, `non_local`, `overlap`, `atss`, `roi_align`, `logits` for what several of them are made of;
`cases` (inputs away from kinks), `compare` (assertions that say where two arrays differ).
"""
