"""The base of all reports: typed, with a format version, and one sentence for a report that is broken."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mla_converters.errors import ConversionError

FORMAT_VERSION = 1


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(extra="forbid")


class Report(Part):
    """What a command measured or did. What one command writes, another reads through this.

    Attributes:
        format_version: of the report; a reader refuses other versions.
    """

    format_version: int = FORMAT_VERSION

    @classmethod
    def parse(cls, content: dict[str, Any], origin: str, writer: str) -> Self:
        """The report in ``content``.

        Args:
            content: as JSON has it.
            origin: where it was read, for errors.
            writer: the command that writes such reports, for errors.

        Raises:
            ConversionError: it is no such report, or of another version.
        """
        version = content.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ConversionError(
                f"{origin} has format version {version}, and this vllm-mla reads version {FORMAT_VERSION}: use the "
                "version of vllm-mla-plugin that wrote it."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConversionError(
                f"{origin} is not a report that {writer} wrote ({place}: {first['msg'].lower()})."
            ) from error

    def as_json(self) -> dict[str, Any]:
        """The report as JSON has it; what does not apply is left out."""
        return self.model_dump(mode="json", exclude_none=True)
