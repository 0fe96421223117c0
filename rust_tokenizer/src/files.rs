//! Texts from files, a batch at a time.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};

use crate::count::{Batch, FULL};
use crate::error::Error;

/// The column of parquet files that holds the texts.
const COLUMN: &str = "text";
/// Documents of parquet that are read at once: a page is unpacked as a whole anyway.
const RECORDS: usize = 64;

/// The texts of `.parquet` files (column `text`; rows without a value are skipped) and of plain text files, in order.
/// A row is a text; a plain file is cut, where a line break is followed by something visible, into texts of about
/// `FULL` bytes, which the default pattern would cut there too.
pub struct Texts {
    /// Last file first.
    waiting: Vec<PathBuf>,
    open: Option<Open>,
    characters: u64,
    limit: u64,
}

enum Open {
    Parquet { path: PathBuf, file: SerializedFileReader<File>, group: usize, rows: Option<Box<Rows>> },
    Plain { path: PathBuf, file: File, offset: usize, rest: Vec<u8> },
}

/// What is left of a row group.
struct Rows {
    column: ColumnReaderImpl<ByteArrayType>,
    left: usize,
}

impl Texts {
    /// Texts until `limit` characters are through, the one that reaches it included; all of them if not given.
    pub fn new(mut paths: Vec<PathBuf>, limit: Option<u64>) -> Self {
        paths.reverse();
        Self { waiting: paths, open: None, characters: 0, limit: limit.unwrap_or(u64::MAX) }
    }

    /// The characters read so far.
    pub fn characters(&self) -> u64 {
        self.characters
    }

    /// Adds the next texts to a batch; none at the end.
    pub fn fill(&mut self, batch: &mut Batch) -> Result<(), Error> {
        while !batch.is_full() && self.characters < self.limit {
            if self.open.is_none() {
                let Some(path) = self.waiting.pop() else { break };
                self.open = Some(Open::new(path)?);
            }
            if let Some(open) = &mut self.open {
                let mut take = |text: &str| {
                    if self.characters < self.limit {
                        self.characters += text.chars().count() as u64;
                        batch.push(text);
                    }
                };
                if !open.read(&mut take)? {
                    self.open = None;
                }
            }
        }
        Ok(())
    }
}

impl Open {
    fn new(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(|error| fail(&path, &error))?;
        if path.extension().is_some_and(|suffix| suffix == "parquet") {
            let file = SerializedFileReader::new(file).map_err(|error| fail(&path, &error))?;
            Ok(Self::Parquet { path, file, group: 0, rows: None })
        } else {
            Ok(Self::Plain { path, file, offset: 0, rest: Vec::new() })
        }
    }

    /// Gives some more texts to `take`; false at the end of the file.
    fn read(&mut self, take: &mut impl FnMut(&str)) -> Result<bool, Error> {
        match self {
            Self::Parquet { path, file, group, rows } => {
                let Some(open) = rows else {
                    if *group == file.num_row_groups() {
                        return Ok(false);
                    }
                    let reader = file.get_row_group(*group).map_err(|error| fail(path, &error))?;
                    *rows = Some(Box::new(Rows::new(path, reader.as_ref())?));
                    *group += 1;
                    return Ok(true);
                };
                if !open.read(path, take)? {
                    *rows = None;
                }
                Ok(true)
            }
            Self::Plain { path, file, offset, rest } => {
                let old = rest.len();
                rest.resize(old + FULL, 0);
                let size = read_fully(file, &mut rest[old..]).map_err(|error| fail(path, &error))?;
                rest.truncate(old + size);
                let end = if size < FULL { rest.len() } else { last_border(rest, old) };
                let text = std::str::from_utf8(&rest[..end])
                    .map_err(|error| fail(path, &format!("byte {} is not UTF-8", *offset + error.valid_up_to())))?;
                take(text);
                *offset += end;
                rest.drain(..end);
                Ok(size == FULL)
            }
        }
    }
}

impl Rows {
    fn new(path: &Path, group: &dyn RowGroupReader) -> Result<Self, Error> {
        let metadata = group.metadata();
        let column = metadata.columns().iter().position(|column| column.column_path().parts() == [COLUMN]);
        let Some(column) = column else { return Err(fail(path, &format!("no column {COLUMN:?}"))) };
        let left = metadata.num_rows() as usize;
        match group.get_column_reader(column).map_err(|error| fail(path, &error))? {
            ColumnReader::ByteArrayColumnReader(column) => Ok(Self { column, left }),
            _ => Err(fail(path, &format!("column {COLUMN:?} holds no strings"))),
        }
    }

    fn read(&mut self, path: &Path, take: &mut impl FnMut(&str)) -> Result<bool, Error> {
        if self.left == 0 {
            return Ok(false);
        }
        let mut values: Vec<ByteArray> = Vec::with_capacity(RECORDS);
        let mut defined = Vec::new();
        let (records, _, _) = self
            .column
            .read_records(RECORDS.min(self.left), Some(&mut defined), None, &mut values)
            .map_err(|error| fail(path, &error))?;
        if records == 0 {
            return Err(fail(path, &format!("{} rows are missing", self.left)));
        }
        self.left -= records;
        for value in &values {
            take(std::str::from_utf8(value.data()).map_err(|error| fail(path, &error))?);
        }
        Ok(true)
    }
}

/// The last place at or behind `from` where a text can be cut: between a line break and an ASCII character that is
/// no white space. 0 if there is none.
fn last_border(bytes: &[u8], from: usize) -> usize {
    let border = |at: &usize| bytes[at - 1] == b'\n' && bytes[*at].is_ascii_graphic();
    (from.max(1)..bytes.len()).rev().find(border).unwrap_or(0)
}

/// Reads until the buffer is full or the file ends.
fn read_fully(file: &mut File, mut buffer: &mut [u8]) -> std::io::Result<usize> {
    let whole = buffer.len();
    while !buffer.is_empty() {
        match file.read(buffer) {
            Ok(0) => break,
            Ok(size) => buffer = &mut buffer[size..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(whole - buffer.len())
}

fn fail(path: &Path, why: &impl ToString) -> Error {
    Error::File { path: path.to_owned(), why: why.to_string() }
}
