"""`dualpath eval clients`: standard clients against a single server and a cluster behind both routers.

compare.py        the whole run: who asks whom, what is compared, summary.json
outcome.py        what one client says of one run
environment.py    clients whose pins clash with SGLang's have an environment of their own
routers.py        both routers in front of one cluster
benchmarks.py     SGLang's bench_serving and bench_multiturn
aiperf.py         AIPerf, with synthetic prompts and with agent traces
sdks.py           OpenAI's and Anthropic's Python packages
sdk_openai.py     the program that asks with the first
sdk_anthropic.py  and with the second
curl.py           requests as curl would send them
cases.py          one of each kind
told.py           what an answer tells, comparable
"""
