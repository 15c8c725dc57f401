//! A task's output, as text, whole or from the end, and going on if wanted.

use std::collections::BTreeMap;
use std::io::SeekFrom;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Failure, RouteState};
use crate::task::{AllocDir, check_task_name};
use crate::workload::AllocId;

/// How often a followed file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Pieces that wait for a slow reader.
const QUEUE: usize = 8;
/// Size of a piece.
const PIECE: usize = 64 * 1024;

/// `GET /v1/culvert/allocation/:id/logs/:task?type=stdout|stderr&follow=true&tail=BYTES`
pub(super) async fn logs(
    State(state): State<Arc<RouteState>>,
    Path((id, task)): Path<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Response, Failure> {
    let not_found = |what: String| Failure(StatusCode::NOT_FOUND, what);
    let refused = |what: String| Failure(StatusCode::BAD_REQUEST, what);
    let view =
        state.node()?.runner.allocation(&id).ok_or_else(|| not_found(format!("no allocation {id:?}, or several")))?;
    check_task_name(&task).map_err(|error| refused(error.to_string()))?;
    if !view.record.job.group(&view.record.group).is_some_and(|group| group.tasks.iter().any(|one| one.name == task)) {
        return Err(not_found(format!("allocation {id:?} has no task {task:?}")));
    }
    let kind = match query.get("type").map_or("stdout", String::as_str) {
        kind @ ("stdout" | "stderr") => kind,
        other => return Err(refused(format!("Invalid value for type: {other:?}"))),
    };
    let follow = matches!(query.get("follow").map(String::as_str), Some("" | "true"));
    let tail = query.get("tail").map(|text| text.parse::<u64>()).transpose();
    let tail = tail.map_err(|_| refused("Invalid value for tail: a number of bytes".to_owned()))?;
    let alloc = AllocId::new(&view.record.id).map_err(|error| refused(error.to_string()))?;
    let prefix = AllocDir::new(&state.data_dir, &alloc).logs().join(format!("{task}.{kind}"));
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        // The reader going away is the usual end of following.
        drop(copy(&prefix, tail, follow, &sender).await);
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

type Pieces = mpsc::Sender<std::io::Result<Bytes>>;

/// Copies the files `<prefix>.<n>` in order of their number, then what is appended.
async fn copy(prefix: &FilePath, tail: Option<u64>, follow: bool, pieces: &Pieces) -> std::io::Result<()> {
    let mut files = numbered(prefix).await;
    if tail.is_some() {
        files = files.split_off(files.len().saturating_sub(1));
    }
    let mut last = None;
    for (number, path) in files {
        let mut file = File::open(&path).await?;
        if let Some(tail) = tail {
            let length = file.metadata().await?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(tail))).await?;
        }
        drain(&mut file, pieces).await?;
        last = Some((number, file));
    }
    if !follow {
        return Ok(());
    }
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if pieces.is_closed() {
            return Ok(());
        }
        if let Some((_, file)) = &mut last {
            drain(file, pieces).await?;
        }
        let behind = last.as_ref().map(|(number, _)| *number);
        if let Some((number, path)) = numbered(prefix).await.into_iter().find(|(number, _)| Some(*number) > behind) {
            let mut file = File::open(&path).await?;
            drain(&mut file, pieces).await?;
            last = Some((number, file));
        }
    }
}

async fn drain(file: &mut File, pieces: &Pieces) -> std::io::Result<()> {
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        if file.take(PIECE as u64).read_to_end(&mut piece).await? == 0 {
            return Ok(());
        }
        let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        pieces.send(Ok(piece.into())).await.map_err(gone)?;
    }
}

async fn numbered(prefix: &FilePath) -> Vec<(u64, PathBuf)> {
    let (Some(folder), Some(name)) = (prefix.parent(), prefix.file_name().and_then(|name| name.to_str())) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let Ok(mut entries) = tokio::fs::read_dir(folder).await else { return found };
    while let Ok(Some(entry)) = entries.next_entry().await {
        let file = entry.file_name();
        let number = file.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('.')?.parse().ok());
        found.extend(number.map(|number| (number, entry.path())));
    }
    found.sort();
    found
}
