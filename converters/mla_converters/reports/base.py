"""The base of all reports. Reports are typed and have a format version; a broken one gives an error of one sentence."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mla_converters.errors import ConversionError

FORMAT_VERSION = 1


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(extra="forbid")


class Report(Part):
    """The result of a command. One command writes the report, and another reads it with :meth:`parse`.

    Attributes:
        format_version: version of the report's format; a reader refuses other versions.
    """

    format_version: int = FORMAT_VERSION

    @classmethod
    def parse(cls, content: dict[str, Any], origin: str, writer: str) -> Self:
        """Make the report from ``content``.

        Args:
            content: the report as a JSON object.
            origin: the file or place of the report, for errors.
            writer: the command that writes such reports, for errors.

        Raises:
            ConversionError: ``content`` is not such a report, or has another version.
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
        """The report as a JSON object, without the entries that are None."""
        return self.model_dump(mode="json", exclude_none=True)
