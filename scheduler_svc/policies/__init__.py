"""The choices themselves: pure functions and objects of what engines report.

path_request.py        what a path policy may know
help_policy.py         who helps which prefill engine
path_policies.py       which side reads which pages
lane_model.py          when a request's two storage lanes end
placement_policies.py  which pair of engines serves a request
placement_rules.py     the paper's rules for that
lazy_heap.py           the least loaded of many engines, without looking at all
"""
