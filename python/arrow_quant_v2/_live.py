"""Lists and dicts of a configuration: ordinary ones, whose every change in place is also made in the configuration, or raises as setting it would.

The library keeps settings as values, so that what an attribute hands out is made from them. Each changing method starts from the present setting and sets
the changed one. Copies and pickles are plain lists and dicts.
"""

__all__ = ["LiveDict", "LiveList"]


def writing_back(base, name):
    method = getattr(base, name)

    def change(self, *args, **keywords):
        changed = base(getattr(self.config, self.setting))
        answer = method(changed, *args, **keywords)
        setattr(self.config, self.setting, changed)
        refill(self, changed)
        return self if answer is changed else answer

    change.__name__, change.__qualname__, change.__doc__ = name, f"{base.__name__}.{name}", method.__doc__
    return change


def refill(live, values):
    if isinstance(live, list):
        list.__setitem__(live, slice(None), values)
    else:
        dict.clear(live)
        dict.update(live, values)


def live(base, names):
    def init(self, values, config, setting):
        base.__init__(self, values)
        self.config, self.setting = config, setting

    members = {name: writing_back(base, name) for name in names.split()}
    members |= {"__slots__": ("config", "setting"), "__init__": init, "__reduce_ex__": lambda self, _: (base, (base(self),)), "__module__": __name__}
    return type(f"Live{base.__name__.title()}", (base,), members)


LiveList = live(list, "append extend insert remove pop clear sort reverse __setitem__ __delitem__ __iadd__ __imul__")
LiveDict = live(dict, "pop popitem clear update setdefault __setitem__ __delitem__ __ior__")
