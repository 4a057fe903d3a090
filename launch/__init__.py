"""Describes, starts and supervises a whole cluster on one machine.

cli.py        `dualpath up`, `status`, `doctor`, `patch`, `topology`
options.py    what several commands have
status.py     what `dualpath status` says
top/          `dualpath top`: the same, live, with rates
config/       what one YAML file says
clusters/     the files that come with this package
checks/       `dualpath doctor`: what will not work, and the remedy
setup/        system libraries, patches, the tiny model
processes/    commands, environments, ports and logs of the parts
plan/         all of them as data, for whoever runs them
render/       plans as files, for other hosts
supervision/  starts them in order, watches them, stops them
topology/     shaped links between network namespaces
engine.py     what starts one SGLang server: its plugins proven to run
"""
