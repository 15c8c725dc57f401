//! A task's output, as text, whole or from the end, and going on if wanted.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;

use super::{Failure, RouteState};
use crate::task::logs::{self, Cursor, Stream};
use crate::task::{AllocDir, check_task_name};
use crate::workload::AllocId;

/// How often a followed log is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Pieces that wait for a slow reader.
const QUEUE: usize = 8;
/// Longest piece.
const PIECE: usize = 64 * 1024;

/// What was asked for.
#[derive(Debug, Eq, PartialEq)]
struct Wanted {
    stream: Stream,
    follow: bool,
    /// Bytes from the end; `None`: everything there is.
    tail: Option<u64>,
}

impl Wanted {
    fn parse(query: &BTreeMap<String, String>) -> Result<Self, Failure> {
        let refused = |what: String| Failure(StatusCode::BAD_REQUEST, what);
        let text = |key: &str| query.get(key).map(String::as_str);
        let stream = match text("type") {
            None | Some("stdout") => Stream::Stdout,
            Some("stderr") => Stream::Stderr,
            Some(other) => return Err(refused(format!("Invalid value for type: {other:?}"))),
        };
        let follow = match text("follow") {
            None | Some("false") => false,
            Some("" | "true") => true,
            Some(other) => return Err(refused(format!("Invalid value for follow: {other:?}"))),
        };
        let tail = text("tail").map(str::parse).transpose();
        let tail = tail.map_err(|_| refused("Invalid value for tail: a number of bytes".to_owned()))?;
        Ok(Self { stream, follow, tail })
    }
}

/// `GET /v1/culvert/allocation/:id/logs/:task?type=stdout|stderr&follow=true&tail=BYTES`
pub(super) async fn logs(
    State(state): State<Arc<RouteState>>,
    Path((id, task)): Path<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Response, Failure> {
    let not_found = |what: String| Failure(StatusCode::NOT_FOUND, what);
    let refused = |what: String| Failure(StatusCode::BAD_REQUEST, what);
    let live = state.node()?.runner.follow(&id);
    let live = live.ok_or_else(|| not_found(format!("no allocation {id:?}, or several")))?;
    check_task_name(&task).map_err(|error| refused(error.to_string()))?;
    let record = live.borrow().record.clone();
    if !record.job.group(&record.group).is_some_and(|group| group.tasks.iter().any(|one| one.name == task)) {
        return Err(not_found(format!("allocation {id:?} has no task {task:?}")));
    }
    let Wanted { stream, follow, tail } = Wanted::parse(&query)?;
    let alloc = AllocId::new(&record.id).map_err(|error| refused(error.to_string()))?;
    let log = Log { folder: AllocDir::new(&state.data_dir, &alloc).logs(), task, stream };
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        if let Err(error) = copy(&log, tail, follow.then_some(live), &sender).await {
            // Ends the answer in the middle: what is missing must not look like the end. The reader may be gone.
            drop(sender.send(Err(error)).await);
        }
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

/// One output of one task.
#[derive(Clone)]
struct Log {
    folder: PathBuf,
    task: String,
    stream: Stream,
}

impl Log {
    /// Looks at the files on a thread where that may take its time.
    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let log = self.clone();
        spawn_blocking(move || look(&log)).await.map_err(io::Error::other)?
    }

    async fn tail(&self, bytes: u64) -> io::Result<Cursor> {
        self.look(move |log| logs::tail(&log.folder, &log.task, log.stream, bytes)).await
    }

    async fn read(&self, after: Cursor) -> io::Result<(Vec<u8>, Cursor)> {
        self.look(move |log| logs::read(&log.folder, &log.task, log.stream, after, PIECE)).await
    }
}

type Pieces = mpsc::Sender<io::Result<Bytes>>;

/// Copies what is there; then, while there is somebody to `follow`, what is appended.
async fn copy<T>(
    log: &Log,
    tail: Option<u64>,
    mut follow: Option<watch::Receiver<T>>,
    pieces: &Pieces,
) -> io::Result<()> {
    let end = log.tail(0).await?;
    let mut cursor = match tail {
        Some(bytes) => log.tail(bytes).await?,
        None => Cursor::default(),
    };
    loop {
        // Asked before reading: what was written until the end is read after it.
        let ended = follow.as_ref().is_none_or(|life| life.has_changed().is_err());
        while follow.is_some() || cursor < end {
            let (bytes, next) = log.read(cursor).await?;
            cursor = next;
            if bytes.is_empty() {
                break;
            }
            if pieces.send(Ok(bytes.into())).await.is_err() {
                return Ok(());
            }
        }
        let Some(life) = follow.as_mut().filter(|_| !ended) else { return Ok(()) };
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            // A task that ends says so before its files go.
            _ = life.changed() => {}
            () = pieces.closed() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::logs::Rotator;

    fn log() -> (tempfile::TempDir, Log) {
        let directory = tempfile::tempdir().expect("a directory");
        let log = Log { folder: directory.path().to_owned(), task: "web".to_owned(), stream: Stream::Stdout };
        (directory, log)
    }

    fn rotator(log: &Log, max_files: u64) -> Rotator {
        Rotator::open(&log.folder, &log.task, log.stream, max_files, 64).expect("opened")
    }

    async fn collect(mut pieces: mpsc::Receiver<io::Result<Bytes>>) -> String {
        let mut text = Vec::new();
        while let Some(piece) = pieces.recv().await {
            text.extend_from_slice(&piece.expect("readable"));
        }
        String::from_utf8(text).expect("text")
    }

    fn copied(log: &Log, tail: Option<u64>, follow: Option<watch::Receiver<()>>) -> mpsc::Receiver<io::Result<Bytes>> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let log = log.clone();
        tokio::spawn(async move {
            if let Err(error) = copy(&log, tail, follow, &sender).await {
                drop(sender.send(Err(error)).await);
            }
        });
        receiver
    }

    #[tokio::test]
    async fn following_misses_no_byte_across_rotations_and_ends_with_the_allocation() {
        let (_directory, log) = log();
        let (life, follow) = watch::channel(());
        let mut rotator = rotator(&log, 1000);
        let reader = tokio::spawn(collect(copied(&log, None, Some(follow))));
        let mut expected = String::new();
        for number in 0..500 {
            let line = format!("line {number}\n");
            rotator.write(line.as_bytes()).expect("written");
            expected.push_str(&line);
            if number % 50 == 0 {
                life.send_replace(());
                tokio::task::yield_now().await;
            }
        }
        drop(life);
        assert_eq!(reader.await.expect("no panic"), expected);
    }

    #[tokio::test]
    async fn the_end_of_a_log_spans_files_and_what_is_not_followed_ends() {
        let (_directory, log) = log();
        let lines: Vec<String> = (0..30).map(|number| format!("line {number:02}\n")).collect();
        rotator(&log, 1000).write(lines.concat().as_bytes()).expect("written");
        assert_eq!(collect(copied(&log, None, None)).await, lines.concat());
        assert_eq!(collect(copied(&log, Some(160), None)).await, lines[10..].concat());
        let (_directory, nothing) = self::log();
        assert_eq!(collect(copied(&nothing, Some(10), None)).await, "");
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_read_does_not_end_as_if_it_were_whole() {
        let (directory, log) = log();
        std::fs::remove_dir_all(directory.path()).expect("removed");
        std::fs::write(directory.path(), "no folder").expect("a file in its place");
        let (sender, _receiver) = mpsc::channel(QUEUE);
        copy::<()>(&log, None, None, &sender).await.expect_err("not a folder");
        std::fs::remove_file(directory.path()).expect("removed");
    }

    #[test]
    fn what_is_asked_for_is_understood_or_refused_by_name() {
        let wanted = |pairs: &[(&str, &str)]| {
            let query = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            Wanted::parse(&query).map_err(|Failure(_, why)| why)
        };
        assert_eq!(wanted(&[]), Ok(Wanted { stream: Stream::Stdout, follow: false, tail: None }));
        let all = [("type", "stderr"), ("follow", ""), ("tail", "12")];
        assert_eq!(wanted(&all), Ok(Wanted { stream: Stream::Stderr, follow: true, tail: Some(12) }));
        for (key, value) in [("type", "both"), ("follow", "yes"), ("tail", "-1")] {
            let why = wanted(&[(key, value)]).expect_err("refused");
            assert!(why.starts_with(&format!("Invalid value for {key}")), "{why}");
        }
    }
}
