"""Off unless asked for: what it gains has not been measured.

attention_quota.py  a prefill step ends when its attention has had its time
"""
