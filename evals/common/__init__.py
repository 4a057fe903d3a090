"""What all evaluations share.

errors.py         the error that a person can put right
explained.py      told in one line, with exit status 2
documents.py      JSON files of others
nearest_rank.py   quantiles
imbalance.py      how unevenly work is spread
service_level.py  the highest rate that keeps one
"""
