//! `grpc.health.v1.Health`, which Nomad and Kubernetes ask on the xDS port. By hand: two messages and one method, no code
//! generator and no further crate. Source: gRPC health checking protocol.

use std::convert::Infallible;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::Service;

/// The service that is served beside health checking itself.
const ADS: &str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
/// Health checking itself.
const HEALTH: &str = "grpc.health.v1.Health";
const CHECK: &str = "/grpc.health.v1.Health/Check";
/// `ServingStatus.SERVING`.
const SERVING: i32 = 1;

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, Eq, PartialEq, prost::Message)]
pub(super) struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    pub(super) service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, Eq, PartialEq, prost::Message)]
pub(super) struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    pub(super) status: i32,
}

/// Answers health checks and hands every other call to `inner`.
#[derive(Clone, Debug)]
pub(super) struct WithHealth<S> {
    inner: S,
}

impl<S> WithHealth<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

/// Serving for as long as it answers.
struct Check;

impl UnaryService<HealthCheckRequest> for Check {
    type Response = HealthCheckResponse;
    type Future = std::future::Ready<Result<Response<HealthCheckResponse>, Status>>;

    fn call(&mut self, request: Request<HealthCheckRequest>) -> Self::Future {
        let service = &request.get_ref().service;
        std::future::ready(match service.as_str() {
            "" | ADS | HEALTH => Ok(Response::new(HealthCheckResponse { status: SERVING })),
            _ => Err(Status::not_found("unknown service")),
        })
    }
}

impl<S> Service<http::Request<Body>> for WithHealth<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != CHECK {
            return Box::pin(self.inner.call(request));
        }
        Box::pin(async move {
            let codec = ProstCodec::<HealthCheckResponse, HealthCheckRequest>::default();
            Ok(Grpc::new(codec).unary(Check, request).await)
        })
    }
}
