"""A cache profile: settings that were found and checked for one model, sampler and number of steps."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "tessera-profile/1"


@dataclass(frozen=True)
class Profile:
    """node: display name of the cache node that the settings are for. inputs: the inputs it sets, by name.
    model: fingerprint of the weights; sampler: name of the sampler's function; steps: of the run.
    facts: what the check measured (error, speed-up, seeds), for people."""

    node: str
    inputs: dict[str, Any]
    model: str = ""
    sampler: str = ""
    steps: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def misfit(self, model: str, sampler: str, steps: int) -> str | None:
        """A sentence where a run is not what the profile was made for; empty fields of the profile fit everything."""
        made = (
            (self.model, model, "model"),
            (self.sampler, sampler, "sampler"),
            (self.steps, steps, "number of steps"),
        )
        wrong = [f"{name} {mine} and not {its}" for mine, its, name in made if mine and mine != its]
        if not wrong:
            return None
        return f"This profile was made for the {', the '.join(wrong)}. Run Solve Threshold again or disconnect it."

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """ValueError where the text is no profile."""
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT or not isinstance(found["inputs"], dict):
                raise ValueError("another format")
            return cls(**found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"This is no cache profile ({error}). Make one with Solve Threshold.") from error
