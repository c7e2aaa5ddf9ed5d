"""Collectors: each collects what a method uses beside the weight of the layer, such as a gradient.

`collect` calls the one that the method has declared in `lorainit.config.inits`. It does so once per run, before the
first layer is initialized, because the model has no adapters then. The model is unchanged afterwards: no hook, gradient
or adapter is left, and its mode is the same. A collector may use the methods. They know only `lorainit.init.evidence`.
"""
