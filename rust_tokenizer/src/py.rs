//! The Python binding: conversions, the interpreter lock, signals and exceptions. The algorithms are elsewhere.

use std::borrow::Cow;
use std::num::NonZero;
use std::time::{Duration, Instant};

use numpy::{Element, IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList, PyString};

use crate::count::{Batch, count_batches};
use crate::decode::{Decoder, Id};
use crate::encode;
use crate::error::Error;
use crate::split::{DEFAULT_PATTERN, Splitter};
use crate::threads::threads_or_all;
use crate::train::learn;
use crate::vocab::Vocabulary;

/// The interval between progress reports during training.
const REPORT: Duration = Duration::from_millis(100);

create_exception!(jaxchat_tokenizer, TokenizerError, PyValueError);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        TokenizerError::new_err(error.to_string())
    }
}

/// The text of a `str`. Lone surrogates, which UTF-8 cannot represent, become U+FFFD, and a surrogate pair becomes its
/// character, as in tiktoken.
fn text_of(text: Bound<'_, PyString>) -> PyResult<PyBackedStr> {
    PyBackedStr::try_from(text.clone()).or_else(|_| {
        let repaired =
            text.call_method1("encode", ("utf-16", "surrogatepass"))?.call_method1("decode", ("utf-16", "replace"))?;
        PyBackedStr::try_from(repaired.cast_into::<PyString>()?)
    })
}

fn texts_of(texts: Vec<Bound<'_, PyString>>) -> PyResult<Vec<PyBackedStr>> {
    texts.into_iter().map(text_of).collect()
}

/// Reports the progress of training to Python, and stops it when Python asks to.
struct Reporter<'a> {
    progress: Option<&'a Py<PyAny>>,
    last: Instant,
}

impl Reporter<'_> {
    /// Checks for signals such as Ctrl-C, and calls `progress(phase, done)` from time to time if it was given. An
    /// exception raised by either ends the training.
    fn report(&mut self, py: Python<'_>, phase: &str, done: u64) -> PyResult<()> {
        py.check_signals()?;
        if let Some(progress) = self.progress
            && self.last.elapsed() >= REPORT
        {
            progress.call1(py, (phase, done))?;
            self.last = Instant::now();
        }
        Ok(())
    }
}

/// Counts the pieces of all batches, then learns from them.
fn learn_from(
    splitter: &Splitter,
    size: usize,
    longest: Option<usize>,
    threads: Option<usize>,
    progress: Option<&Py<PyAny>>,
    mut next: impl FnMut(&mut Reporter, &mut Batch) -> PyResult<()>,
) -> PyResult<Vec<Vec<u8>>> {
    let mut reporter = Reporter { progress, last: Instant::now() };
    let counts =
        count_batches(splitter, threads_or_all(threads.and_then(NonZero::new)), |batch| next(&mut reporter, batch))?;
    let mut stop = None;
    let tokens = learn(&counts, size, longest.unwrap_or(usize::MAX), |done| {
        stop = Python::attach(|py| reporter.report(py, "merge", done as u64)).err();
        stop.is_some()
    });
    match stop {
        Some(error) => Err(error),
        None => Ok(tokens?),
    }
}

/// Learns at most `size` tokens from an iterable of `str` and returns them as a list of `bytes`; the index is the id.
///
/// No token has more than `longest` bytes; without it, there is no limit.
///
/// `progress(phase, done)` is called from time to time, first with "count" and the number of characters read, then with
/// "merge" and the number of tokens.
#[pyfunction]
#[pyo3(signature = (texts, size, pattern, longest=None, threads=None, progress=None))]
fn train<'py>(
    py: Python<'py>,
    texts: &Bound<'py, PyAny>,
    size: usize,
    pattern: &str,
    longest: Option<usize>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let splitter = Splitter::new(pattern)?;
    let iterator: Py<PyIterator> = texts.try_iter()?.unbind();
    let mut characters = 0;
    let tokens = py.detach(|| {
        learn_from(&splitter, size, longest, threads, progress.as_ref(), |reporter, batch| {
            Python::attach(|py| {
                reporter.report(py, "count", characters)?;
                pull(iterator.bind(py), batch, &mut characters)
            })
        })
    })?;
    Ok(list_of_bytes(py, &tokens))
}

/// Learns tokens like `train`, from texts in Arrow's layout.
///
/// Each batch is `(source, offsets, bytes)`: text i of the batch is `bytes[offsets[i]:offsets[i + 1]]`, `offsets` is an
/// int64 array, `bytes` is a uint8 array, and `source` names the batch in error messages. Batches of about a megabyte
/// work best. Reads up to and including the text in which the character count reaches `max_chars`. Returns the tokens
/// and the number of characters read.
#[pyfunction]
#[pyo3(signature = (batches, size, pattern, max_chars=None, longest=None, threads=None, progress=None))]
#[allow(clippy::too_many_arguments)]
fn train_arrow<'py>(
    py: Python<'py>,
    batches: &Bound<'py, PyAny>,
    size: usize,
    pattern: &str,
    max_chars: Option<u64>,
    longest: Option<usize>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Vec<Bound<'py, PyBytes>>, u64)> {
    let splitter = Splitter::new(pattern)?;
    let iterator: Py<PyIterator> = batches.try_iter()?.unbind();
    let limit = max_chars.unwrap_or(u64::MAX);
    let mut characters = 0;
    let tokens = py.detach(|| {
        learn_from(&splitter, size, longest, threads, progress.as_ref(), |reporter, batch| {
            Python::attach(|py| {
                reporter.report(py, "count", characters)?;
                while batch.is_empty() && characters < limit {
                    let Some(item) = iterator.bind(py).clone().next() else { break };
                    characters += take_arrow(&item?, batch, limit - characters)?;
                }
                Ok(())
            })
        })
    })?;
    Ok((list_of_bytes(py, &tokens), characters))
}

/// Fills a batch with texts in Arrow's layout until they have `limit` characters. Returns the number of characters.
fn take_arrow(item: &Bound<'_, PyAny>, batch: &mut Batch, limit: u64) -> PyResult<u64> {
    type Arrow<'py> = (String, PyReadonlyArray1<'py, i64>, PyReadonlyArray1<'py, u8>);
    let (source, offsets, bytes): Arrow = item.extract()?;
    let (offsets, bytes) = (slice_of(&offsets), slice_of(&bytes));
    item.py().detach(|| {
        batch.replace(&offsets, &bytes).map_err(|why| Error::Texts { source, why: why.into() })?;
        Ok(batch.truncate(limit))
    })
}

fn list_of_bytes<'py>(py: Python<'py>, tokens: &[Vec<u8>]) -> Vec<Bound<'py, PyBytes>> {
    tokens.iter().map(|token| PyBytes::new(py, token)).collect()
}

/// Adds texts to a batch until it is full; adds none once the iterator is exhausted.
fn pull(iterator: &Bound<'_, PyIterator>, batch: &mut Batch, characters: &mut u64) -> PyResult<()> {
    for text in iterator.clone() {
        let text = text?.cast_into::<PyString>()?;
        *characters += text.len()? as u64;
        batch.push(&text_of(text)?);
        if batch.is_full() {
            break;
        }
    }
    Ok(())
}

/// Ids as Python passes them.
#[derive(FromPyObject)]
enum Ids<'py> {
    List(Bound<'py, PyList>),
    Unsigned(PyReadonlyArray1<'py, u32>),
    Signed(PyReadonlyArray1<'py, i64>),
    Sequence(Vec<i64>),
}

/// Ids independent of the interpreter, copied only where necessary.
enum Plain<'a> {
    Unsigned(Cow<'a, [u32]>),
    Signed(Cow<'a, [i64]>),
}

impl Ids<'_> {
    fn plain(&self) -> PyResult<Plain<'_>> {
        Ok(match self {
            Self::List(list) => {
                Plain::Signed(list.iter().map(|id| id.extract()).collect::<PyResult<Vec<i64>>>()?.into())
            }
            Self::Unsigned(array) => Plain::Unsigned(slice_of(array)),
            Self::Signed(array) => Plain::Signed(slice_of(array)),
            Self::Sequence(ids) => Plain::Signed(ids.into()),
        })
    }
}

fn slice_of<'a, T: Element + Clone>(array: &'a PyReadonlyArray1<'_, T>) -> Cow<'a, [T]> {
    match array.as_slice() {
        Ok(slice) => slice.into(),
        // The array is not contiguous, such as a slice with a step.
        Err(_) => array.as_array().to_vec().into(),
    }
}

impl Plain<'_> {
    fn decode(&self, decoder: &Decoder, threads: Option<usize>) -> Result<Vec<u8>, Error> {
        let threads = threads.and_then(NonZero::new);
        match self {
            Self::Unsigned(ids) => decoder.decode(ids, threads),
            Self::Signed(ids) => decoder.decode(ids, threads),
        }
    }

    /// Decodes straight into a Python `bytes` object, which saves a copy.
    fn decode_to_python<'py>(
        &self,
        py: Python<'py>,
        decoder: &Decoder,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        fn fill<'py, I: Id + Send>(
            py: Python<'py>,
            decoder: &Decoder,
            ids: &[I],
            threads: Option<usize>,
        ) -> PyResult<Bound<'py, PyBytes>> {
            let decoding = py.detach(|| decoder.prepare(ids, threads.and_then(NonZero::new)))?;
            PyBytes::new_with(py, decoding.size(), |out| {
                py.detach(|| decoding.write(out));
                Ok(())
            })
        }
        match self {
            Self::Unsigned(ids) => fill(py, decoder, ids, threads),
            Self::Signed(ids) => fill(py, decoder, ids, threads),
        }
    }

    /// The number of decoded bytes up to each of the offsets, which must be in ascending order.
    fn ends(&self, decoder: &Decoder, offsets: &[usize]) -> Result<Vec<usize>, Error> {
        let mut at = 0;
        let size = |range: std::ops::Range<usize>| match self {
            Self::Unsigned(ids) => decoder.size(&ids[range]),
            Self::Signed(ids) => decoder.size(&ids[range]),
        };
        let ends = std::iter::once(&0).chain(offsets).zip(offsets).map(|(&start, &end)| {
            at += size(start..end)?;
            Ok(at)
        });
        ends.collect()
    }

    fn len(&self) -> usize {
        match self {
            Self::Unsigned(ids) => ids.len(),
            Self::Signed(ids) => ids.len(),
        }
    }
}

/// Encodes and decodes with a vocabulary: `tokens`, whose indices are their ids, followed by the `special` tokens.
#[pyclass(frozen, module = "jaxchat_tokenizer")]
struct Encoder {
    core: encode::Encoder,
    decoder: Decoder,
    /// One `int` per id, so that making a list of ids only increments reference counts.
    ints: Vec<Py<PyInt>>,
}

#[pymethods]
impl Encoder {
    /// Without `merges`, any two tokens whose concatenation is a token may merge, lowest id first (tiktoken's rule).
    /// With `merges`, exactly these pairs of ids merge, in this order (Hugging Face's rule; `whole_pieces` is its
    /// `ignore_merges`). Text that the pattern does not match is dropped, or kept as pieces if `keep_gaps` is true.
    #[new]
    #[pyo3(signature = (tokens, special, pattern, merges=None, whole_pieces=true, keep_gaps=false))]
    fn new(
        py: Python<'_>,
        tokens: Vec<Vec<u8>>,
        special: Vec<String>,
        pattern: &str,
        merges: Option<Vec<(u32, u32)>>,
        whole_pieces: bool,
        keep_gaps: bool,
    ) -> PyResult<Self> {
        let size = tokens.len() + special.len();
        let core = py.detach(|| {
            let vocabulary = match merges {
                None => Vocabulary::new(tokens)?,
                Some(merges) => Vocabulary::with_merges(tokens, &merges, whole_pieces)?,
            };
            Ok::<_, Error>(encode::Encoder::new(Splitter::new(pattern)?.keep_gaps(keep_gaps), vocabulary))
        })?;
        let tokens = core.vocabulary().tokens().iter().map(AsRef::as_ref);
        let decoder = Decoder::new(tokens.chain(special.iter().map(String::as_bytes)));
        let ints = (0..size).map(|id| id.into_pyobject(py).map(Bound::unbind)).collect::<Result<_, _>>()?;
        Ok(Self { core, decoder, ints })
    }

    /// Encodes each text to a list of ids.
    #[pyo3(signature = (texts, prepend=None, append=None, threads=None))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        prepend: Option<u32>,
        append: Option<u32>,
        threads: Option<usize>,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let texts = texts_of(texts)?;
        let encoded = py.detach(|| self.core.encode(&texts, prepend, append, threads.and_then(NonZero::new)))?;
        let ranges = encoded.offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize);
        ranges.map(|range| PyList::new(py, encoded.ids[range].iter().map(|&id| &self.ints[id as usize]))).collect()
    }

    /// Encodes all texts to one uint32 array of ids, and an int64 array of the offset at which each text starts and the
    /// last one ends.
    #[pyo3(signature = (texts, prepend=None, threads=None))]
    #[allow(clippy::type_complexity)]
    fn encode_to_numpy<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        prepend: Option<u32>,
        threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>)> {
        let texts = texts_of(texts)?;
        let encoded = py.detach(|| self.core.encode(&texts, prepend, None, threads.and_then(NonZero::new)))?;
        Ok((encoded.ids.into_pyarray(py), encoded.offsets.into_pyarray(py)))
    }

    /// Decodes ids to the concatenated bytes of their tokens.
    fn decode<'py>(&self, py: Python<'py>, ids: Ids<'py>) -> PyResult<Bound<'py, PyBytes>> {
        ids.plain()?.decode_to_python(py, &self.decoder, None)
    }

    /// Decodes ids to text. Bytes that are not valid UTF-8 become U+FFFD.
    #[pyo3(signature = (ids, threads=None))]
    fn decode_text<'py>(
        &self,
        py: Python<'py>,
        ids: Ids<'py>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyString>> {
        let bytes = ids.plain()?.decode_to_python(py, &self.decoder, threads)?;
        PyString::from_encoded_object(&bytes, Some(c"utf-8"), Some(c"replace"))
    }

    /// Decodes each range `ids[offsets[i]:offsets[i + 1]]` to text: the inverse of `encode_to_numpy`.
    #[pyo3(signature = (ids, offsets, threads=None))]
    fn decode_batch<'py>(
        &self,
        py: Python<'py>,
        ids: Ids<'py>,
        offsets: Vec<usize>,
        threads: Option<usize>,
    ) -> PyResult<Vec<Bound<'py, PyString>>> {
        let ids = ids.plain()?;
        if !offsets.is_sorted() || offsets.last().is_some_and(|&last| last > ids.len()) {
            let size = ids.len();
            return Err(TokenizerError::new_err(format!("offsets must ascend and end at {size}, the number of ids")));
        }
        let (bytes, ends) =
            py.detach(|| Ok::<_, Error>((ids.decode(&self.decoder, threads)?, ids.ends(&self.decoder, &offsets)?)))?;
        let texts = ends.windows(2).map(|pair| String::from_utf8_lossy(&bytes[pair[0]..pair[1]]));
        Ok(texts.map(|text| PyString::new(py, &text)).collect())
    }
}

#[pymodule]
fn jaxchat_tokenizer(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("DEFAULT_PATTERN", DEFAULT_PATTERN)?;
    module.add("TokenizerError", module.py().get_type::<TokenizerError>())?;
    module.add_class::<Encoder>()?;
    module.add_function(wrap_pyfunction!(train, module)?)?;
    module.add_function(wrap_pyfunction!(train_arrow, module)?)
}
