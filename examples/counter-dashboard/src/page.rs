//! The page, its event stream and the health endpoint.

use std::convert::Infallible;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;

use crate::counting::State;

type Body = BoxBody<Bytes, Infallible>;

pub(crate) async fn answer(
    state: watch::Receiver<State>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    Ok(match (request.method(), request.uri().path()) {
        (&Method::GET, "/") => text("text/html; charset=utf-8", include_str!("page.html").to_owned()),
        (&Method::GET, "/health") => text("application/json", "{\"status\":\"ok\"}".to_owned()),
        (&Method::GET, "/state") => {
            let json = state.borrow().json();
            text("application/json", json)
        }
        (&Method::GET, "/events") => events(state),
        _ => {
            let mut response = text("text/plain", "not found\n".to_owned());
            *response.status_mut() = StatusCode::NOT_FOUND;
            response
        }
    })
}

fn text(content_type: &'static str, body: String) -> Response<Body> {
    respond(content_type, Full::new(Bytes::from(body)).boxed())
}

/// Server-sent events: the present state at once, then each change. A watch holds one value, so a slow reader costs nothing.
fn events(state: watch::Receiver<State>) -> Response<Body> {
    let stream =
        WatchStream::new(state).map(|state| Ok(Frame::data(Bytes::from(format!("data: {}\n\n", state.json())))));
    respond("text/event-stream", boxed(stream))
}

fn boxed(stream: impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + Sync + 'static) -> Body {
    BodyExt::boxed(StreamBody::new(stream)) // not StreamExt::boxed
}

fn respond(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
