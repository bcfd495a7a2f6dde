"""Which method fits the model, the data and the hardware, computed before anything runs. Nothing here needs torch,
but for measuring the machine at hand.
"""
