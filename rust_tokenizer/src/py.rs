//! The Python binding: conversions, the interpreter lock, signals and exceptions; nothing of the algorithms.

use std::num::NonZero;

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList, PyString};

use crate::count::{Batch, count_batches};
use crate::decode::Decoder;
use crate::encode;
use crate::error::Error;
use crate::split::{DEFAULT_PATTERN, Splitter};
use crate::train::learn;
use crate::vocab::Vocabulary;

/// Texts are pulled from the iterator in batches of about this many bytes.
const BATCH: usize = 1 << 20;

create_exception!(jaxchat_tokenizer, TokenizerError, PyValueError);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        TokenizerError::new_err(error.to_string())
    }
}

/// The text of a `str`. Lone surrogates, which no UTF-8 has, become U+FFFD, and a pair of them its character: what
/// tiktoken does.
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

fn threads_of(threads: Option<usize>) -> NonZero<usize> {
    threads
        .and_then(NonZero::new)
        .unwrap_or_else(|| std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
}

/// Learns at most `size` tokens from an iterable of `str` and returns them as a list of `bytes`; the index is the id.
#[pyfunction]
#[pyo3(signature = (texts, size, pattern, threads=None))]
fn train<'py>(
    py: Python<'py>,
    texts: &Bound<'py, PyAny>,
    size: usize,
    pattern: &str,
    threads: Option<usize>,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let splitter = Splitter::new(pattern)?;
    let iterator: Py<PyIterator> = texts.try_iter()?.unbind();
    let tokens = py.detach(|| {
        let counts = count_batches(&splitter, threads_of(threads), || Python::attach(|py| pull(iterator.bind(py))))?;
        let mut signal = None;
        let tokens = learn(&counts, size, || {
            signal = Python::attach(|py| py.check_signals()).err();
            signal.is_some()
        });
        match signal {
            Some(error) => Err(error),
            None => tokens.map_err(PyErr::from),
        }
    })?;
    Ok(tokens.iter().map(|token| PyBytes::new(py, token)).collect())
}

/// The next batch of texts; None at the end.
fn pull(iterator: &Bound<'_, PyIterator>) -> PyResult<Option<Batch>> {
    iterator.py().check_signals()?;
    let mut batch = Batch::default();
    for text in iterator.clone() {
        batch.push(&text_of(text?.cast_into::<PyString>()?)?);
        if batch.bytes() >= BATCH {
            break;
        }
    }
    Ok(Some(batch).filter(|batch| !batch.is_empty()))
}

/// Ids from Python: an array of int64, or a sequence of int.
#[derive(FromPyObject)]
enum Ids<'py> {
    Array(PyReadonlyArray1<'py, i64>),
    Sequence(Vec<i64>),
}

/// Encodes and decodes with a vocabulary of `tokens`, whose indices are their ids, and `special` tokens behind them.
#[pyclass(frozen, module = "jaxchat_tokenizer")]
struct Encoder {
    core: encode::Encoder,
    decoder: Decoder,
    /// One `int` an id: a list of ids then only counts references.
    ints: Vec<Py<PyInt>>,
}

#[pymethods]
impl Encoder {
    #[new]
    fn new(py: Python<'_>, tokens: Vec<Vec<u8>>, special: Vec<String>, pattern: &str) -> PyResult<Self> {
        let size = tokens.len() + special.len();
        let core =
            py.detach(|| Ok::<_, Error>(encode::Encoder::new(Splitter::new(pattern)?, Vocabulary::new(tokens)?)))?;
        let tokens = core.vocabulary().tokens().iter().map(AsRef::as_ref);
        let decoder = Decoder::new(tokens.chain(special.iter().map(String::as_bytes)));
        let ints = (0..size).map(|id| id.into_pyobject(py).map(Bound::unbind)).collect::<Result<_, _>>()?;
        Ok(Self { core, decoder, ints })
    }

    /// A list of ids for each text.
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

    /// All ids in one array of uint32, and an array of int64 that says where each text starts and the last one ends.
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

    /// The bytes of the tokens, one after the other.
    fn decode<'py>(&self, py: Python<'py>, ids: Ids<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = match ids {
            Ids::Array(array) => match array.as_slice() {
                Ok(ids) => self.decoder.decode(ids),
                Err(_) => self.decoder.decode(&array.as_array().to_vec()),
            },
            Ids::Sequence(ids) => self.decoder.decode(&ids),
        }?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// The bytes of each token that is not special, in the order of ids.
    fn tokens<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        self.core.vocabulary().tokens().iter().map(|token| PyBytes::new(py, token)).collect()
    }

    #[getter]
    fn pattern(&self) -> &str {
        self.core.pattern()
    }
}

#[pymodule]
fn jaxchat_tokenizer(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("DEFAULT_PATTERN", DEFAULT_PATTERN)?;
    module.add("TokenizerError", module.py().get_type::<TokenizerError>())?;
    module.add_class::<Encoder>()?;
    module.add_function(wrap_pyfunction!(train, module)?)
}
