"""How instruction data are made from captions and boxes: generated, checked, reviewed, built and published."""
