"""The errors a user can cause. Each message is one sentence that names the remedy."""


class UserError(ValueError):
    """The configuration, a path or a store on disk cannot be used as asked; nothing was changed on disk."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class StoreError(UserError):
    """A path or the store found there cannot be used (missing, locked, damaged, of another format, too small)."""
