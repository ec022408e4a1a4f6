"""Float64 loops written from the published formulas: what the library's losses and gradients are compared with.

Nothing here imports the library, and no vectorised maths is used: a level is read and written one element at a time, in Python floats (IEEE
doubles), so that a formula stands here as it stands on paper. Gradients are closed forms where one is known; `numeric.gradient` (five-point
differences) checks the closed forms and serves where there is none.

Modules: `primitives` (channel means, weighted sums, attention, imitation), `maps` (normalised maps and their distance), `boxes` (masks),
`gkd`, `bmfi`, `aid` (the losses), `cases` (inputs away from kinks), `compare` (assertions that say where two arrays differ).
"""
