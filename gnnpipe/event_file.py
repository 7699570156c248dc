"""TensorBoard's event file, written without torch: scalars, texts, pictures, layout, HParams.

Why not ``torch.utils.tensorboard``: the process that writes the file needs no torch, which takes
a second and a quarter of a gigabyte to load.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

Charts = Mapping[str, Mapping[str, Sequence[str]]]
"""Of each category its charts, of each chart the patterns of its tags."""


class EventFile:
    """One event file of a run.

    Args:
        directory: where; TensorBoard reads all event files there as one run.
        num_done: epochs that earlier files hold; what they hold of later ones is hidden.
    """

    def __init__(self, directory: str | Path, *, num_done: int = 0) -> None:
        self._writer: Any = EventFileWriter(str(directory))  # has no types
        if num_done:
            self._add(Event(session_log=SessionLog(status=SessionLog.START)), num_done + 1)

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Adds one point to each curve; None is left out."""
        points = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if value is not None
        ]
        self._add(Event(summary=Summary(value=points)), step)

    def text(self, tag: str, text: str) -> None:
        """Adds a text, shown letter by letter."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown: as it is
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[indented.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        self._tensor(tag, text_metadata.create_summary_metadata("", ""), tensor)

    def picture(self, tag: str, png: bytes, step: int, *, size: tuple[int, int]) -> None:
        """Adds a picture.

        Args:
            tag: its name.
            png: the picture as a PNG file.
            step: epoch that it shows.
            size: width and height, pixels.
        """
        width, height = size
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._add(Event(summary=Summary(value=[Summary.Value(tag=tag, image=image)])), step)

    def layout(self, categories: Charts) -> None:
        """Groups curves in the Custom Scalars tab."""
        layout = layout_pb2.Layout(
            category=[
                layout_pb2.Category(
                    title=title,
                    chart=[
                        layout_pb2.Chart(
                            title=name, multiline=layout_pb2.MultilineChartContent(tag=tags)
                        )
                        for name, tags in charts.items()
                    ],
                )
                for title, charts in categories.items()
            ]
        )
        tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()])
        metadata = layout_metadata.create_summary_metadata()
        self._tensor(layout_metadata.CONFIG_SUMMARY_TAG, metadata, tensor)

    def start_session(self, hparams: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Names the settings of the run, and the scalars that judge it, for the HParams tab."""
        infos = [api_pb2.HParamInfo(name=name, type=_type_of(v)) for name, v in hparams.items()]
        shown = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
        experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=shown)
        self._hparams(hparams_metadata.EXPERIMENT_TAG, experiment=experiment)
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in hparams.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, int | float):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = str(value)
        self._hparams(hparams_metadata.SESSION_START_INFO_TAG, session_start_info=start)

    def end_session(self) -> None:
        """Marks the run as finished."""
        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.Status.Value("STATUS_SUCCESS"), end_time_secs=time.time()
        )
        self._hparams(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=end)

    def flush(self) -> None:
        """Makes what was added visible to readers."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _hparams(self, tag: str, **content: Any) -> None:  # one of three protocol buffers
        data = plugin_data_pb2.HParamsPluginData(
            version=hparams_metadata.PLUGIN_DATA_VERSION, **content
        )
        plugin = SummaryMetadata.PluginData(
            plugin_name=hparams_metadata.PLUGIN_NAME, content=data.SerializeToString()
        )
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
        self._add(Event(summary=Summary(value=[value])), 0)

    def _tensor(self, tag: str, metadata: Any, tensor: TensorProto) -> None:
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._add(Event(summary=Summary(value=[value])), 0)

    def _add(self, event: Event, step: int) -> None:
        event.wall_time = time.time()
        event.step = step
        self._writer.add_event(event)


def _type_of(value: object) -> int:
    if isinstance(value, bool):
        name = "DATA_TYPE_BOOL"
    else:
        name = "DATA_TYPE_FLOAT64" if isinstance(value, int | float) else "DATA_TYPE_STRING"
    return int(api_pb2.DataType.Value(name))
