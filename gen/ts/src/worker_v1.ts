/** Calls of processes that execute runs: `runlane.worker.v1`. */
export * from './gen/runlane/worker/v1/worker_service.js';
