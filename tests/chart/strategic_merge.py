"""How Kubernetes applies the patches that Helm sends: lists of named things are merged by name, all else is replaced."""

KEYS = ("name", "mountPath", "containerPort", "port")  # by which two items of a list are the same thing


def merged(old: object, patch: object) -> object:
    """`old` is left as it is. A directive's name begins with "$"."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) and patch.get("$patch") != "replace" else {}
    if "$retainKeys" in patch:
        result = {key: value for key, value in result.items() if key in patch["$retainKeys"]}
    for key, value in patch.items():
        directive, _, name = key.partition("/")
        if directive == "$deleteFromPrimitiveList":
            result[name] = [item for item in result.get(name, []) if item not in value]
        elif key.startswith("$"):
            continue
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, list):
            result[key] = merged_list(result.get(key, []), value)
        else:
            result[key] = merged(result.get(key), value)
    return result


def merged_list(old: list, patch: list) -> list:
    every = [*old, *patch]
    by = next((key for key in KEYS if patch and all(isinstance(item, dict) and key in item for item in every)), None)
    if by is None:
        return patch
    result = {item[by]: item for item in old}
    for item in patch:
        if item.get("$patch") == "delete":
            result.pop(item[by], None)
        else:
            result[item[by]] = merged(result.get(item[by]), item)
    return list(result.values())
