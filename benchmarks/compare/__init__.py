"""Two versions of kdkernels measured against each other: fresh processes in pairs, paired ratios, verdicts with few false alarms."""
