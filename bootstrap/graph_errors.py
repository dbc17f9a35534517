"""ComfyUI's two kinds of bad news about a graph, refused and failed, as one exception with a sentence."""


class GraphError(RuntimeError):
    """A graph was refused or failed. `kind` is ComfyUI's error type or the exception's name, or "interrupted"."""

    def __init__(self, message, kind, node_id=None, node_type=None, details=None):
        super().__init__(message)
        self.kind, self.node_id, self.node_type, self.details = kind, node_id, node_type, details


def refusal(body):
    """The GraphError of a graph that validation refused, from the server's answer."""
    error, nodes = body.get("error") or {}, body.get("node_errors") or {}
    if isinstance(error, str):
        error = {"message": error}
    reasons = [
        (node_id, node.get("class_type"), reason)
        for node_id, node in nodes.items()
        for reason in node.get("errors", ())
    ]
    if not reasons:
        text = " ".join(filter(None, (error.get("message"), error.get("details"))))
        node_id, node_type = ((error.get("extra_info") or {}).get(key) for key in ("node_id", "class_type"))
        return GraphError(f"The graph was refused: {text}", error.get("type"), node_id, node_type, body)
    sentences = [f"node {i} ({kind}): {reason['message']}: {reason['details']}" for i, kind, reason in reasons]
    node_id, node_type, reason = reasons[0]
    return GraphError(f"The graph was refused: {'; '.join(sentences)}", reason["type"], node_id, node_type, body)


def failure(kind, data):
    """The GraphError of a run that ended with the event `kind`, or None if that event ends no run."""
    node_id, node_type = data.get("node_id"), data.get("node_type")
    if kind == "execution_interrupted":
        return GraphError(
            f"The run was interrupted in node {node_id} ({node_type}).", "interrupted", node_id, node_type
        )
    if kind == "execution_error":
        name, text = data.get("exception_type", ""), str(data.get("exception_message", "")).strip()
        message = f"Node {node_id} ({node_type}) failed with {name}: {text}"
        return GraphError(message, name, node_id, node_type, data)
    return None
