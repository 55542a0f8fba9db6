"""All that this package uses of timm's private API, in one place."""
from typing import Any, Callable, Dict

from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import load_model_config_from_path

__all__ = [
    'FeatureGetterNet', 'feature_take_indices', 'load_model_config_from_path', 'report_webdataset_errors',
]


def report_webdataset_errors(report: Callable[[str, Exception], None]) -> None:
    """Let timm's reader of WebDataset shards report what it cannot read, instead of leaving it out.

    Args:
        report: Gets the name of the sample or shard, and the error; raises another one.
    """
    from timm.data.readers import reader_wds

    decode = getattr(reader_wds._decode, 'decode', reader_wds._decode)  # of timm, also at the second call

    def reporting(sample: Dict[str, Any], **kwargs: Any) -> Any:
        try:
            return decode(sample, **kwargs)
        except Exception as e:  # PIL and json raise whatever damaged samples lead them to
            report(f'{sample.get("__key__")} in {sample.get("__url__")}', e)

    def report_shard(error: Exception) -> bool:
        report(str(error.args[-1]) if len(error.args) > 1 else '', error)  # webdataset puts the shard last
        return False

    reporting.decode = decode
    reader_wds._decode, reader_wds.log_and_continue = reporting, report_shard
