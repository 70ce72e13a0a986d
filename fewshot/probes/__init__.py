"""The probes: classifiers that are fitted to the frozen features of a support set, all in fp64.

Each has a module; `table.py` names them for configs, reports and help. `fitted.py` is what a fit returns.
"""
