"""One script per figure; each reads a result folder and nothing else: `python figures/NAME.py --result A --out B`."""
